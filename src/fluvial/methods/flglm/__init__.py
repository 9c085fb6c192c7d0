"""FL-GLM and FedSEA-LLaMA: split learning, where first and last layers stay at the site.

Zheng, Zhang, Wang, Qiu, Zheng, Zheng, "Safely Learning with Private Data: A Federated Learning
Framework for LLM", EMNLP 2024, https://arxiv.org/abs/2406.14898; Zhang, Zhang, Li, Zhang, Dong,
Tong, Zheng, "A Secure, Efficient and Adaptive Federated Splitting Framework for LLMs"
(FedSEA-LLaMA), AAAI 2026, https://arxiv.org/abs/2505.15683.

A model is cut in three. Embedding and first layers (A), and last layers with the head (C), are a
site's, with its tokens and labels; the layers between (B) are the server's. In every step hidden
states go to the server and back, and their gradients too, so the update is that of the whole model.
"""

from fluvial.federation.meter import AUDIT, MEASURING, SAMPLING
from fluvial.methods.flglm.audit import leakage
from fluvial.methods.flglm.choice import settled
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.planning import plan
from fluvial.methods.flglm.server import FlGlmServer
from fluvial.methods.flglm.tasks import train
from fluvial.methods.flglm.use import evaluate, sample
from fluvial.methods.interface import Method, Traits

METHOD = Method(
    FlGlmConfig,
    FlGlmServer,
    {"train": train, MEASURING: evaluate, SAMPLING: sample, AUDIT: leakage},
    paper="Zheng et al., Safely Learning with Private Data: A Federated Learning Framework for LLM "
    "(FL-GLM), EMNLP 2024, https://arxiv.org/abs/2406.14898",
    plan=plan,
    traits=Traits(
        "FL-GLM",
        tunes=("lora", "full"),
        sends="own code",
        receives="own code",
        packs=False,
        shares_steps=False,
        coded_by="method.hidden and method.gradient",
    ),
    settled=settled,
)
