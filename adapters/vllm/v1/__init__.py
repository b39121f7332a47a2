"""Runs where vLLM chooses Model Runner V1: its drafts. `verified/` runs only where drafts are verified or measured."""
