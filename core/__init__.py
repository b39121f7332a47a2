"""The core: batch descriptor, metadata buffers, reference, Triton kernels and replay plans. It imports no engine."""
