"""vLLM's real drafts without a worker, of both model runners, and vLLM as the conformance kit sees it."""
