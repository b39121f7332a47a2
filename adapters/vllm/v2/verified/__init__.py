"""Runs only where drafts of Model Runner V2 are verified or measured."""
