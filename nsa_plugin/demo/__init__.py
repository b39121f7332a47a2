"""The demo: a decode trace is prepared step by step and by this package, and every value is compared."""
