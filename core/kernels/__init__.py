"""Triton kernels. `core/reference.py` defines what each must equal; `core/triton_binding.py` binds them to buffers."""
