"""Looking into a UNet: evaluations, and what goes in and out at given modules."""

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
