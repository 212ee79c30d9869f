"""Data attribution by traker's documented calls: test_compat_programs.py runs it with and without flashcoreset.compat. Its random numbers
differ, so what is printed are facts that hold for any."""

import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

torch.manual_seed(0)
x, y = torch.randn(200, 20), torch.arange(200) % 3
model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
loader = DataLoader(TensorDataset(x, y), batch_size=50)

with tempfile.TemporaryDirectory() as folder:
    traker = TRAKer(
        model=model, task="image_classification", train_set_size=200, save_dir=folder, device="cpu", proj_dim=128,
        use_half_precision=False, logging_level=50,
    )  # fmt: skip
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in loader:
        traker.featurize(batch=batch, num_samples=50)
    traker.finalize_features()
    traker.start_scoring_checkpoint("targets", model.state_dict(), model_id=0, num_targets=4)
    traker.score(batch=(x[:4], y[:4]), num_samples=4)
    scores = torch.as_tensor(traker.finalize_scores(exp_name="targets")[:])
print(tuple(scores.shape), scores.argmax(0).tolist())  # a sample's own score is the highest

g = torch.randn(5, 10_000)
for kind in (ProjectionType.normal, "rademacher"):
    projector = BasicProjector(10_000, 2048, seed=1, proj_type=kind, device="cpu", block_size=512)
    p = projector.project(g, model_id=0)
    kept = (p @ p.T) / 2048 / 10_000
    print(kind, tuple(p.shape), p.dtype, bool((kept - g @ g.T / 10_000).abs().max() < 0.12))
    print(torch.equal(p, projector.project(g, model_id=0)), torch.equal(p, projector.project(g, model_id=1)))
    projector.free_memory()
