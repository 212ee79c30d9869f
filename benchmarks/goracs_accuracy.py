"""What GORACS' gradient norms do to accuracy: ``python -m benchmarks.goracs_accuracy`` prints the tables of docs/goracs.md, in about two
minutes.

scikit-learn's digits: 500 are held out, 200 with right labels are the validation set, and the others are what is chosen from, with right
labels or with a tenth of them wrong. A small network is trained on the validation set; its hidden layer gives the embeddings, and its
last layer the gradient norms, as one would take them from a model that is to be fine-tuned. It is trained anew on the K items that each
choice keeps, and scored on the held-out images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flashcoreset as fc

HELD_OUT, VALIDATION, K = 500, 200, 100
STEPS, BATCH, RATE = 300, 32, 0.1
BOUNDS = {"max_exchanges": 30, "max_solves": 100}


class Problem:
    """One split of the digits, and what a network says of it."""

    def __init__(self, seed: int, wrong_share: float) -> None:
        self.seed = seed
        images, digits = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        self.test, valid, rows = order.split([HELD_OUT, VALIDATION, len(x) - HELD_OUT - VALIDATION])
        self.x, self.y, self.x_valid, self.y_valid = x[rows], y[rows].clone(), x[valid], y[valid]
        self.x_test, self.y_test = x[self.test], y[self.test]
        self.wrong = torch.zeros(len(rows), dtype=torch.bool)
        self.wrong[torch.randperm(len(rows), generator=generator)[: int(wrong_share * len(rows))]] = True
        shift = torch.randint(1, 10, (len(rows),), generator=generator)
        self.y[self.wrong] = ((self.y + shift) % 10)[self.wrong]

        model = self.trained(self.x_valid, self.y_valid)
        sketcher = fc.GradientSketcher(model, None, parameters=["2.weight"])  # norms alone, of the last layer
        with sketcher:
            nn.functional.cross_entropy(model(self.x), self.y).backward()
        self.norms = sketcher.norms
        with torch.no_grad():
            self.train, self.valid = model[:2](self.x), model[:2](self.x_valid)

    def trained(self, x: Tensor, y: Tensor) -> nn.Sequential:
        generator = torch.Generator().manual_seed(1000 + self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        for _ in range(STEPS):
            batch = torch.randint(0, len(x), (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        return model

    def score(self, kept: Tensor) -> tuple[float, float]:
        """The accuracy after training on the kept items, and the share of wrong labels among them."""
        model = self.trained(self.x[kept], self.y[kept])
        with torch.no_grad():
            accuracy = float((model(self.x_test).argmax(1) == self.y_test).float().mean())
        return accuracy, float(self.wrong[kept].float().mean())


Choice = Callable[[Problem, bool], Tensor]


def chosen(**options: object) -> Choice:
    def choose(problem: Problem, labels: bool) -> Tensor:
        by_class = {"train_labels": problem.y, "valid_labels": problem.y_valid} if labels else {}
        return fc.goracs(
            problem.train, problem.valid, problem.norms, K, **{**BOUNDS, **options}, **by_class
        ).indices

    return choose


def at_random(problem: Problem, labels: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2000 + problem.seed)
    order = torch.randperm(len(problem.y), generator=generator)
    if not labels:
        return order[:K]
    budgets = fc.allocate_budgets(torch.bincount(problem.y_valid, minlength=10), K).tolist()
    return torch.cat([order[problem.y[order] == c][:count] for c, count in enumerate(budgets)])


CHOICES: dict[str, Choice] = {
    "random": at_random,
    "cover alone, lam = 0": chosen(max_exchanges=0),
    "lam = 0": chosen(),
    "lam = 0.05": chosen(lam=0.05),
    "lam = 0.1": chosen(lam=0.1),
    "lam = 0.5": chosen(lam=0.5),
    "lam = 0.5, norm_clip=0.9": chosen(lam=0.5, norm_clip=0.9),
    "lam = 1, norm_scale=spread": chosen(lam=1.0, norm_scale="spread"),
}


def text(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args(argv).seeds
    torch.set_num_threads(1)
    for wrong_share in (0.0, 0.1):
        problems = [Problem(seed, wrong_share) for seed in range(seeds)]
        print(
            f"{100 * wrong_share:.0f} % of the labels wrong, {K} of {len(problems[0].y)} items, {seeds} seeds"
        )
        for labels in (False, True):
            print("with labels" if labels else "without labels")
            for name, choose in CHOICES.items():
                accuracies, wrong = zip(*(p.score(choose(p, labels)) for p in problems), strict=True)
                line = f"  {name:28} accuracy {text(list(accuracies)):>13} %"
                print(line + (f", wrong labels {text(list(wrong)):>13} %" if wrong_share else ""), flush=True)
        info = fc.goracs(problems[0].train, problems[0].valid, problems[0].norms, K, lam=0.5, **BOUNDS).info
        print(f"spread over the items at lam = 0.5: {info['spread']}, parts of the score {info['parts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
