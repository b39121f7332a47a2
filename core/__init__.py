"""The engine: batch descriptor, metadata buffers, reference, kernels, fast copy and replay plans. Knows no engine."""
