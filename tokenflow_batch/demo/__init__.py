"""A small trained text-to-image model and synthetic scenes with exact ground truth.

The model (`model/`, described in `MODEL_CARD.md`) has the layout of Stable Diffusion and knows one
domain: a coloured shape on a textured ground. `scenes` draws that domain, as stills and as videos
whose optical flow, masks and occlusions are known exactly, so that an edit can be measured.
"""
