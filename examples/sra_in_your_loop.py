"""SRA in a training loop of your own, in plain PyTorch:  python examples/sra_in_your_loop.py

A small SiT learns scikit-learn's digits for a minute on a CPU core. Another target is another
``align``, such as ``SelfFlowConfig(student_layer=2, teacher_layer=4)``.
"""

import copy

import torch

from sra_fast import ops
from sra_fast.alignment.ema_teacher import EMATeacherConfig
from sra_fast.alignment.objective import add_heads, make_objective
from sra_fast.alignment.schedule import align_weights
from sra_fast.config.schema import Config, ModelConfig
from sra_fast.data.digits import Digits
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.models import ClassLabels
from sra_fast.utils.registry import TARGETS

SIZES = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=64, depth=6, num_heads=4)


def train(steps: int, batch: int = 64, decay: float = 0.99, device: str = "cpu") -> tuple:
    """The student, its EMA, and the loss of every step."""
    align = EMATeacherConfig(student_layer=2, teacher_layer=4)
    cfg = Config(ModelConfig("SiT-S/2", **SIZES), align)
    data = Digits()
    torch.manual_seed(0)
    student = cfg.model.build()
    add_heads(student, cfg)
    student.to(device)
    ema = copy.deepcopy(student).requires_grad_(False)
    # the teacher is the first blocks of the EMA: its weights are the EMA's own, not a copy
    depth = TARGETS[align.target].network_depth(align)
    teacher = cfg.model.build_teacher(depth).to(device).eval()
    weights = ema.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()}, assign=True)
    objective = make_objective(cfg, student, teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(data), (batch,))
        images, labels = (part.to(device) for part in data.__getitems__(rows))
        # noise, times and dropped labels are a function of seed, step and image
        shape = (batch, *images.shape[1:])
        tokens = student.num_tokens if objective.has_groups else 0
        drawn = draw(0, step, 0, shape, device, drop_prob=0.1, posterior=False, tokens=tokens)
        condition = ClassLabels(labels, drawn.drop)
        micro_batch = MicroBatch(images, condition, drawn.noise, objective.times(drawn))
        lambdas = align_weights(cfg, step, epoch=step * batch // len(data))
        loss, _parts = objective(micro_batch, list(lambdas.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # fp32, of every parameter; the teacher moves with it
        ops.ema_update_(ema.parameters(), student.parameters(), decay)
        losses.append(loss.detach())
    return student, ema, torch.stack(losses).tolist()


if __name__ == "__main__":
    losses = train(400, device="cuda" if torch.cuda.is_available() else "cpu")[-1]
    for step in range(0, len(losses), 50):
        print(f"steps {step} to {step + 50}: loss {sum(losses[step : step + 50]) / 50:.3f}")
