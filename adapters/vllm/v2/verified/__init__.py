"""What runs only where the settings ask that drafts of Model Runner V2 be verified or measured."""
