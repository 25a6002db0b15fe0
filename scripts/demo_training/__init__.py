"""How the demo model is trained: one module per stage of `scripts/train_demo_model.py`."""
