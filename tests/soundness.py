"""Every attack of the project on the certificate's rule itself: none gets below its bound.

    python -m tests.soundness --run RUN --method ours --targets 20 --intruders 10    # 200 pairs
    python -m tests.soundness --model FILE.py:NAME --data folder --root PHOTOS

The flags are those of attacks.py. Each intruder's patch is trained on the rule, by the gradient of
the mask that decides, with ten times the iterations of the preset: at the place where the bound is
lowest, and where the gradient is largest of all windows; and, against App. C's own places, as
eyeglasses and squares. A line a target in soundness.jsonl in the method's folder; the same
command goes on. Exit status 1 where an attack got below a bound by more than 1e-5 of it.
"""

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import attacks as a
import embed as e
from data import model, run

TOLERANCE = 1e-5


class Hunted(a.Covered):
    """The rule for an attacker in a hurry: every fortieth time all masks are looked at, every
    fourth the eight that then gave the largest distances, in between the one that decided last."""

    calls, few, last = 0, 8, None

    def forward(self, images: Tensor) -> Tensor:
        same = self.last is not None and len(self.last) == len(images)
        # a patch changes few pixels
        same = same and (images != self.last).float().mean() < 0.2
        self.calls, self.last = self.calls + 1, images.detach().clone()
        if self.calls % 40 == 1 or not same:
            self.active = self.squared(images.detach()).topk(min(self.few, len(self.masks))).indices
            self.decides = self.active[:, 0]
        elif self.calls % 4 == 1:
            with torch.no_grad():
                several = images.repeat_interleave(self.active.shape[1], 0), self.active.flatten()
                values = torch.cat([self.hidden(x, one[None]) for x, one in zip(*several)])
                seen = a.paste(several[0], values, self.pixels[several[1]])
                d = a.squared_distance(self.embed(seen), self.anchors[self.active].flatten(0, 1))
            largest = d.view(len(images), -1).argmax(1, keepdim=True)
            self.decides = self.active.gather(1, largest)[:, 0]
        return self.under(images, self.decides)


def largest_gradient(rule: a.Covered, images: Tensor) -> Tensor:
    """Of all places of the patch, for each image (N,) the one with the most squared gradient."""
    images = images.clone().requires_grad_()
    loss = a.squared_distance(rule(images), rule.anchor).sum()
    (grad,) = torch.autograd.grad(loss, images)
    return e.window_energy(grad, *rule.rule.patch, 1).argmax(1)


def anywhere(rule: a.Covered, images: Tensor, place: Tensor, effort: a.Effort) -> dict[str, Tensor]:
    """Attacked images of each attack that takes a patch of one size, at its weakest place (N,)."""
    rng = functools.partial(torch.Generator().manual_seed, 0)
    weakest = rule.rule.patches_at(place)
    steepest = rule.rule.patches_at(largest_gradient(rule, images))
    other = rule.anchor + 0.1 * rule.anchor.roll(1)  # another direction, as the indirect attack
    sign = effort._replace(optimiser="sign")
    given = rule, images, rule.anchor
    found = {
        "indirect": a.indirect_attack(*given, other, weakest, effort),  # and direct: the better
        "steepest": a.tanh_attack(*given, steepest, effort, rng()),
        "sign": a.tanh_attack(*given, weakest, sign, rng()),
    }
    found = {name: attack.images for name, attack in found.items()}
    one = weakest[0]  # the universal patch has one place
    pattern, _ = a.universal_patch(*given, one, effort, rng())
    found["universal"] = a.apply_pattern(images, pattern, one)
    drawn = [
        a.random_patterns(rule, x[None], rule.anchor, m, 10, rng()) for x, m in zip(images, weakest)
    ]
    return found | {"random": torch.cat([attack.images for attack in drawn])}


def at_places(rule: a.Covered, images: Tensor, effort: a.Effort) -> dict[str, Tensor]:
    """The same by App. C's own patches: eyeglasses, and squares whose place is searched."""
    rng, (H, W) = functools.partial(torch.Generator().manual_seed, 0), images.shape[2:]
    given, sign = (rule, images, rule.anchor), effort._replace(optimiser="sign")
    mask, places = a.eyeglasses_mask(H, W), a.square_positions(5, H, W)
    search = effort._replace(iterations=2, lr=0.3)
    found = {
        "eyeglasses": a.tanh_attack(*given, mask, effort, rng()),
        "eyeglasses, sign": a.tanh_attack(*given, mask, sign, rng()),
        "square": a.square_attack(*given, places, effort, search, rng()),
    }
    return {name: attack.images for name, attack in found.items()}


def hunt(
    config: a.Config, embed: a.Embed, anchor: Tensor, fill: Tensor | None, images: Tensor
) -> dict[str, tuple[float, float, float]]:
    """{attack: (least of score / bound - 1, mean bound, mean score)} over the images (N, C, H, W)
    of intruders, under both threat models."""
    effort = a.effort_of("rule_attacked", config)
    effort = effort._replace(iterations=10 * effort.iterations)
    result = {}
    for name in ("rule", "rule_places"):
        cover = a.cover_named(name, config, *images.shape[2:])
        rule, hunted = (
            kind(embed, anchor, cover, fill, config.rule_anchor == "masked")
            for kind in (a.Covered, Hunted)
        )
        effort = effort._replace(chunk=len(images) * rule.views)  # one batch
        _, bound, place, _ = a.certify(rule, images)
        found = {"none": images}
        if name == "rule":
            found |= anywhere(hunted, images, place.cpu(), effort)
        else:
            found |= at_places(hunted, images, effort)
        for attack, attacked in found.items():
            reached = a.certify(rule, attacked).score
            least = float((reached / bound - 1).min())
            result[f"{name}: {attack}"] = least, float(bound.mean()), float(reached.mean())
    return result


def hunt_all(argv: Sequence[str]) -> int:
    config, args, held = a.parse(argv)
    device = run.start(args.device)
    config = dataclasses.replace(config, precision=run.precision(config.precision, device))
    if config.model:
        embed = model.load_model("--model", config.model, device)[0]
        name = model.model_name(config.model)
    else:
        (name,) = config.method
        embed = e.load_embedding(args.run / name / "embedding.pt", device)
    people = a.judged(config, args.run, held)
    faces, file, lines = people.faces, args.run / name / "soundness.jsonl", []
    text = file.read_text() if file.exists() else ""
    done = {line["target"]: line for line in map(json.loads, text.splitlines())}
    for person in people.targets:
        target = faces.names[person]
        if target not in done:
            own = (
                (faces.person == person)
                .nonzero()
                .flatten()
                .tolist()[: config.target_images or None]
            )
            load = lambda index: a.to_float(faces.images[index].to(device))
            rng = a.stable_generator(config.seed, target, "intruders")
            given = people.near, people.far, config.intruders, 0, rng
            tested, _ = a.choose_intruders(faces.person, person, *given)
            anchor = load(own)[a.select_anchor(a.extract(embed, load(own)))]
            fill = a.fill_of(config.rule_fill, people, anchor)
            judge = a.Mirrored(embed) if "both" in config.defences else embed
            found = hunt(config, judge, anchor, fill, load(tested))
            done[target] = {"target": target, "pairs": len(tested), "attacks": found}
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(done[target]) + "\n")
            print(target, *(f"{k} {v[0]:+.1e}" for k, v in found.items()), sep="  ", flush=True)
        lines.append(done[target])
    return told(name, lines)


def told(name: str, lines: list[dict]) -> int:
    """Print a line for each attack; 1 where a score lies below its bound."""
    pairs = sum(line["pairs"] for line in lines)
    least = min(v[0] for line in lines for v in line["attacks"].values())
    for attack in lines[0]["attacks"]:
        bound, score = (
            sum(line["attacks"][attack][k] * line["pairs"] for line in lines) / pairs
            for k in (1, 2)
        )
        lowest = min(line["attacks"][attack][0] for line in lines)
        print(f"{name}  {attack}: mean bound {bound:.4f}, reached {score:.4f}, least {lowest:+.2e}")
    verdict = "none below" if least >= -TOLERANCE else "BELOW"
    print(f"{name}: {pairs} pairs, {len(lines[0]['attacks'])} attacks, {verdict} its bound")
    return int(least < -TOLERANCE)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".* of .* gradients")
    raise SystemExit(run.command("tests.soundness", hunt_all, sys.argv[1:]))
