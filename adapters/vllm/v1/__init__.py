"""Model Runner V1's draft. Runs where vLLM chooses that runner; `verified/` only where drafts are verified or measured."""
