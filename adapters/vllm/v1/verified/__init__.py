"""Runs only where drafts of Model Runner V1 are verified or measured."""
