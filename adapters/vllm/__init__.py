"""vLLM's Model Runner V2 (0.28 and later): FlashMLA-sparse joins the fused multi-step draft; and Model Runner V1."""
