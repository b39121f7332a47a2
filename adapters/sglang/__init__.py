"""The sglang adapter, for its DeepSeek Sparse Attention backends, which older releases call NSA.

`adapter` installs by the `ledger`; `releases` has every difference between releases. Data flow: `describe`, then
`preparation` at capture, then its `replay`. `compare` is for verification only.
"""
