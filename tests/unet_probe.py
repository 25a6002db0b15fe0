"""Looking into a UNet: evaluations, what goes in and out at given modules, attention by formula."""

import numpy as np
import torch
from tiny_model import WIDTH

from tokenflow_batch.tokenflow.injection import CONV_SITE

CONV = f"{CONV_SITE}.conv2"


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def evaluate(unet, x, text=None):
    text = normal(99, len(x), 5, WIDTH) if text is None else text
    return unet(x, 421, encoder_hidden_states=text, return_dict=False)[0]


class Recorder:
    """What comes in and goes out at given modules, by hooks of its own."""

    def __init__(self, unet, *names):
        self.inputs, self.outputs = {}, {}
        self._handles = [
            unet.get_submodule(n).register_forward_hook(self._keep(n), with_kwargs=True)
            for n in names
        ]

    def _keep(self, name):
        def hook(_module, args, kwargs, output):
            self.inputs[name] = (args or tuple(kwargs.values()))[0]
            self.outputs[name] = output

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def linear(module, x):
    """A projection in float64."""
    y = x @ module.weight.double().numpy().T
    return y if module.bias is None else y + module.bias.double().numpy()


def attention_in_float64(attn, queries, keys, values):
    """(L, C) from the tokens that queries, keys and values are made of, head by head."""
    q, k, v = linear(attn.to_q, queries), linear(attn.to_k, keys), linear(attn.to_v, values)
    width = q.shape[1] // attn.heads
    parts = []
    for head in range(attn.heads):
        own = slice(head * width, (head + 1) * width)
        logits = q[:, own] @ k[:, own].T / np.sqrt(width)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, own])
    return linear(attn.to_out[0], np.concatenate(parts, axis=1))
