"""TokenFlow once more, slow and plain, to compare the package with.

Written from the method's description alone: loops over branches, frames, heads and tokens, an
attention processor of its own, nothing of the package imported.

In float64, so that no two tokens are equally near but for rounding; the latents between steps are
float32, as in the package.

Letters: T steps, F frames, K keyframes, B frames a segment, L tokens, C channels.
"""

import math
from dataclasses import dataclass, field

import torch

QK_BLOCKS = [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]


@dataclass
class Reference:
    """One edit.

    official: as the published code: correspondences found on the way, neighbours b and b−1, weights
        by segment centres through a sigmoid, source rows in every batch. Otherwise: features of a
        pass over the source and shared by sites of one resolution, both true neighbours, linear
        weights, tokens from where the motion leads that those around agree on, in the later half of
        the steps from where the 3 × 3 around say; what a mix of tokens loses of its distance from
        the mean token is given back.
    guided: the steps with guidance; the others take the target's prediction.
    """

    unet: torch.nn.Module
    prediction: str
    length: int
    guidance: float
    qk_steps: int
    conv_steps: int
    official: bool
    guided: range = range(1000)
    kind: str = "plain"
    step: int = 0
    keyframes: list = field(default_factory=list)
    frames: list = field(default_factory=list)
    keyframe_tokens: dict = field(default_factory=dict)
    keyframe_outputs: dict = field(default_factory=dict)
    source_tokens: dict = field(default_factory=dict)
    source_conv: torch.Tensor | None = None
    size: tuple = ()
    motions: dict = field(default_factory=dict)
    late: bool = False

    def edit(self, timesteps, alphas, final_alpha, x, source, embeds, keyframes):
        """Latents after each step, (T, F, C, h, w); `source` is (T, F, C, h, w)."""
        self.size = tuple(x.shape[-2:])
        plain = dict(self.unet.attn_processors)
        mine = {
            n: _Processor(self, n) if n.endswith("attn1.processor") else p for n, p in plain.items()
        }
        self.unet.set_attn_processor(mine)
        conv = self.unet.up_blocks[1].resnets[1].conv2.register_forward_hook(self._on_conv)
        after = []
        try:
            for self.step, t in enumerate(timesteps):
                self.late = self.step >= len(timesteps) // 2
                self.keyframes = [int(k) for k in keyframes[self.step]]
                noise = self._window(x, source[self.step], t, alphas[self.step], embeds)
                a = alphas[self.step]
                b = alphas[self.step + 1] if self.step + 1 < len(alphas) else final_alpha
                clean = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
                x = math.sqrt(b) * clean + math.sqrt(1 - b) * noise
                after.append(x)
        finally:
            conv.remove()
            self.unet.set_attn_processor(plain)
        return torch.stack(after)

    def _window(self, x, source, t, alpha, embeds):
        if not self.official:
            self.kind, self.frames, self.motions = "source", list(range(len(x))), {}
            self._evaluate(source, [embeds[0]] * len(x), t, alpha)
        ks = self.keyframes
        self.kind, self.frames = "keyframes", ks
        self._evaluate(
            torch.cat([source[ks], x[ks], x[ks]]),
            [embeds[r] for r in range(3) for _ in ks],
            t,
            alpha,
        )
        self.kind, guided = "frames", []
        for start in range(0, len(x), self.length):
            self.frames = list(range(start, min(start + self.length, len(x))))
            noise = self._evaluate(
                torch.cat([source[self.frames], x[self.frames], x[self.frames]]),
                [embeds[r] for r in range(3) for _ in self.frames],
                t,
                alpha,
            )
            _, negative, target = noise.chunk(3)
            scale = self.guidance if self.step in self.guided else 1.0
            guided.append(negative + scale * (target - negative))
        self.kind = "plain"
        return torch.cat(guided)

    @torch.no_grad()
    def _evaluate(self, x, embeds, t, alpha):
        out = self.unet(x.double(), t, encoder_hidden_states=torch.stack(embeds).double()).sample
        out = out.float()
        if self.prediction == "v_prediction":
            return math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x
        return out

    def _on_conv(self, _module, _args, output):
        if self.kind == "source":
            self.source_conv = output
        if self.kind in ("plain", "source") or self.step >= self.conv_steps:
            return output
        source, *others = output.chunk(3)
        injected = source if self.official else self.source_conv[self.frames]
        others = [injected for _ in others]
        return torch.cat([source, *others])

    def attention(self, name, attn, tokens):
        if self.kind == "source":
            self.source_tokens[name] = tokens
            return torch.stack([_attend(attn, x, x, x) for x in tokens])
        branches = tokens.chunk(3)
        if self.kind == "keyframes":
            self.keyframe_tokens[name] = branches[0]
            self.keyframe_outputs[name] = self._joint(name, attn, branches)
            return torch.cat(self.keyframe_outputs[name])
        return self._propagated(name, branches)

    def _joint(self, name, attn, branches):
        inject = self.step < self.qk_steps and any(
            name.startswith(f"up_blocks.{b}.attentions.{a}.") for b, a in QK_BLOCKS
        )
        outputs = [torch.stack([_attend(attn, x, x, x) for x in branches[0]])]
        for branch in branches[1:]:
            asking = branches[0] if inject else branch
            everyone = asking.reshape(-1, asking.shape[-1])
            values = branch.reshape(-1, branch.shape[-1])
            outputs.append(torch.stack([_attend(attn, x, everyone, values) for x in asking]))
        return outputs

    def _propagated(self, name, branches):
        rows = [[], [], []]
        for position, frame in enumerate(self.frames):
            for branch in range(3):
                blend, mean, distance = 0, 0, 0
                for k, weight in self._neighbours(frame):
                    edited = self.keyframe_outputs[name][branch][k]
                    if self.official:
                        here, there = branches[0][position], self.keyframe_tokens[name][k]
                        gathered = edited[_nearest(here, there)]
                    else:
                        moved, middle = self._moved(frame, k, len(edited)), edited.mean(dim=0)
                        gathered = moved @ edited
                        mean = mean + weight * middle
                        distance = distance + weight * (moved @ (edited - middle).norm(dim=1))
                    blend = blend + weight * gathered
                if not self.official:
                    restored = distance / (blend - mean).norm(dim=1).clamp(min=1e-12)
                    blend = mean + restored.clamp(1, 1.5).unsqueeze(1) * (blend - mean)
                rows[branch].append(blend)
        return torch.stack([x for branch in rows for x in branch])

    def _shared_tokens(self, length):
        """The source's tokens at all sites with so many, each of length one."""
        group = [t for t in self.source_tokens.values() if t.shape[1] == length]
        return torch.cat([t / t.norm(dim=-1, keepdim=True) for t in group], dim=-1)

    def _moved(self, frame, k, length):
        """Row p: the weights of the keyframe's tokens in a frame's token p."""
        if (frame, k) not in self.motions:
            sizes = [tuple(-(-side // 2**level) for side in self.size) for level in range(9)]
            lengths = {t.shape[1] for t in self.source_tokens.values()}
            motion, before, found = None, None, {}
            for rows, width in sorted(size for size in sizes if math.prod(size) in lengths):
                source = self._shared_tokens(rows * width)
                index = _nearest(source[frame], source[self.keyframes[k]])
                if self.keyframes[k] == frame:
                    index = torch.arange(rows * width)
                start = None if motion is None else enlarged(motion, before, (rows, width))
                motion, before = agreed(index.tolist(), rows, width, start), (rows, width)
                found[rows * width] = (
                    votes(index.tolist(), rows, width)
                    if self.late
                    else bilinear(motion, rows, width)
                )
            self.motions[frame, k] = found
        return self.motions[frame, k][length]

    def _neighbours(self, frame):
        """[(keyframe's position, weight)]"""
        if self.official:
            b = frame // self.length
            if b == 0:
                return [(0, 1.0)]
            p1 = b * self.length + self.length // 2
            p2 = (b - 1) * self.length + self.length // 2
            d1, d2 = abs(frame - p1), abs(frame - p2)
            w = 1 / (1 + math.exp(-d2 / (d1 + d2)))
            return [(b, w), (b - 1, 1 - w)]
        before = [i for i, k in enumerate(self.keyframes) if k <= frame]
        after = [i for i, k in enumerate(self.keyframes) if k >= frame]
        if not before:
            return [(after[0], 1.0)]
        if not after or self.keyframes[before[-1]] == frame:
            return [(before[-1], 1.0)]
        a, b = self.keyframes[before[-1]], self.keyframes[after[0]]
        return [(before[-1], (b - frame) / (b - a)), (after[0], (frame - a) / (b - a))]


class _Processor:
    def __init__(self, reference, name):
        self.reference, self.name = reference, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        assert encoder_hidden_states is None
        assert attention_mask is None
        return self.reference.attention(self.name, attn, hidden_states)


def _attend(attn, queries, keys, values):
    q, k, v = attn.to_q(queries), attn.to_k(keys), attn.to_v(values)
    width = q.shape[-1] // attn.heads
    heads = []
    for h in range(attn.heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[:, part] @ k[:, part].T * width**-0.5
        heads.append(logits.softmax(dim=-1) @ v[:, part])
    return attn.to_out[0](torch.cat(heads, dim=-1))


def agreed(index, rows, width, start):
    """By token, (down, right): mean shift over 5 × 5 tokens, from `start` or their median."""
    own = [(m // width - p // width, m % width - p % width) for p, m in enumerate(index)]
    motion = []
    for p in range(len(index)):
        around = [
            (dy, dx, *own[(p // width + dy) * width + p % width + dx])
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if 0 <= p // width + dy < rows and 0 <= p % width + dx < width
        ]
        if start is None:
            at = [sorted(x[c] for x in around)[(len(around) - 1) // 2] for c in (2, 3)]
        else:
            at = start[p]
        for tolerance in (2.0, 1.0):
            weights = [
                math.exp(
                    -(dy**2 + dx**2) / (2 * 2.0**2)
                    - ((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * tolerance**2)
                )
                for dy, dx, y, x in around
            ]
            votes = [(w, y, x) for w, (_, _, y, x) in zip(weights, around, strict=True)]
            if start is not None:
                votes.append((0.1, *start[p]))
            total = sum(w for w, _, _ in votes)
            if total > 1e-6:
                at = [sum(v[0] * v[c] for v in votes) / total for c in (1, 2)]
        motion.append(at)
    return motion


def enlarged(motion, coarse, fine):
    """Half-pixel bilinear interpolation, in the finer grid's tokens."""
    found = []
    for p in range(math.prod(fine)):
        place = (p // fine[1], p % fine[1])
        sides = []
        for at, few, many in zip(place, coarse, fine, strict=True):
            exact = max((at + 0.5) * few / many - 0.5, 0)
            low = min(int(exact), few - 1)
            sides.append([(low, 1 - (exact - low)), (min(low + 1, few - 1), exact - low)])
        found.append(
            [
                sum(
                    wy * wx * motion[y * coarse[1] + x][c]
                    for y, wy in sides[0]
                    for x, wx in sides[1]
                )
                * fine[c]
                / coarse[c]
                for c in (0, 1)
            ]
        )
    return found


def bilinear(motion, rows, width):
    """Row p: the weights of the tokens between which p's motion ends."""
    weights = torch.zeros(len(motion), len(motion), dtype=torch.float64)
    for p, (down, right) in enumerate(motion):
        y = min(max(p // width + down, 0), rows - 1)
        x = min(max(p % width + right, 0), width - 1)
        for q in range(len(motion)):
            near_y, near_x = 1 - abs(q // width - y), 1 - abs(q % width - x)
            if near_y > 0 and near_x > 0:
                weights[p, q] = near_y * near_x
    return weights


def _nearest(here, there):
    here = here / here.norm(dim=-1, keepdim=True)
    there = there / there.norm(dim=-1, keepdim=True)
    return (here @ there.T).argmax(dim=1)


def votes(index, rows, width):
    """Row p: the weights that the 3 × 3 tokens around p give to the keyframe's tokens."""
    weights = torch.zeros(len(index), len(index), dtype=torch.float64)
    for p in range(len(index)):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                y, x = p // width + dy, p % width + dx
                if not (0 <= y < rows and 0 <= x < width):
                    continue
                to_y, to_x = index[y * width + x] // width - dy, index[y * width + x] % width - dx
                if 0 <= to_y < rows and 0 <= to_x < width:
                    weights[p, to_y * width + to_x] += 2.0 ** -(abs(dy) + abs(dx))
    return weights / weights.sum(dim=1, keepdim=True)
