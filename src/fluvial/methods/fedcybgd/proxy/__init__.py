"""The paper's form of download: a smaller model around the trained block, by layer dropping and
structured pruning.

Wang et al. (2024), https://arxiv.org/abs/2406.11187, name the two operations and give no formula;
the scores and the choice are ours. The server measures on public text what each decoder layer, each
MLP neuron and each group of heads adds to the residual stream (`measure`), decides what a site gets
(`plan_proxy`) and sends only that (`cut`), with the manifest. The site shapes an empty model
accordingly (`slim`): a dropped layer passes its input on, a pruned layer is narrower, and the
trained block is whole.

Layers are counted from 0. A *group* is a key-value head with the query heads that read it; they are
pruned together.
"""

from fluvial.methods.fedcybgd.proxy.anatomy import Anatomy, Layer, Prunable
from fluvial.methods.fedcybgd.proxy.manifest import Manifest
from fluvial.methods.fedcybgd.proxy.plan import chances, plan_proxy
from fluvial.methods.fedcybgd.proxy.pruned_model import Rescale, cut, slim
from fluvial.methods.fedcybgd.proxy.scores import Scores, measure
from fluvial.methods.fedcybgd.proxy.settings import ProxySettings, Prune

__all__ = [
    "Anatomy",
    "Layer",
    "Manifest",
    "ProxySettings",
    "Prunable",
    "Prune",
    "Rescale",
    "Scores",
    "chances",
    "cut",
    "measure",
    "plan_proxy",
    "slim",
]
