"""Runs where vLLM chooses Model Runner V2: its drafts. `verified/` runs only where drafts are verified or measured."""
