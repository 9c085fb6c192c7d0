"""FedPipe: a plan for every site, made automatically, and unequal adapters that add up exactly.

Fang, Lin, Chen, Chen, Gao, Fang, "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning
of Large Language Models", IEEE Transactions on Mobile Computing 2026,
https://arxiv.org/abs/2404.06448.

Sites measure themselves and score the weights of the base. A planner gives each site the weights,
ranks and batch that fit its memory, its speed and its link. The server makes one adapter of the
unequal ones, and sends each site its best approximation at the site's ranks. The paper states these
steps; their formulas are our concretisation, since it publishes neither formulas nor code.
"""

from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.measure import held
from fluvial.methods.fedpipe.planning import plan
from fluvial.methods.fedpipe.server import FedPipeServer
from fluvial.methods.fedpipe.tasks import configure, evaluate, probe, profile, train
from fluvial.methods.interface import Method, Traits

METHOD = Method(
    FedPipeConfig,
    FedPipeServer,
    {
        "profile": profile,
        "probe": probe,
        "configure": configure,
        "train": train,
        "evaluate": evaluate,
    },
    paper="Fang, Lin, Chen, Chen, Gao, Fang, Automated Federated Pipeline for Parameter-Efficient "
    "Fine-Tuning of Large Language Models (FedPipe), IEEE TMC 2026, "
    "https://arxiv.org/abs/2404.06448",
    plan=plan,
    traits=Traits("FedPipe", receives="downlink", weighted=True),
    held=held,
)
