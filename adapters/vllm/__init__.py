"""Runs where vLLM loads this plugin: the adapter of vLLM 0.28 and later, for the drafts of Model Runners V2 and V1."""
