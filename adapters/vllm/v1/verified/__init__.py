"""What runs only where the settings ask that drafts of Model Runner V1 be verified or measured."""
