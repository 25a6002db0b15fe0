"""The method (Geyer et al., *TokenFlow*, ICLR 2024): tensors in, tensors out.

No files and no configuration objects in here. `keyframes` and `windows` are plain Python, so that
planning can count work without importing torch.
"""
