"""Former names of what `pool`, `loading`, `tuning` and `states` hold."""

from fluvial.models.loading import fill as fill
from fluvial.models.loading import load_base as load_base
from fluvial.models.loading import meta_base as meta_base
from fluvial.models.loading import resolve_device as resolve_device
from fluvial.models.loading import skeleton as skeleton
from fluvial.models.loading import weights_folder as weights_folder
from fluvial.models.pool import ModelPool as ModelPool
from fluvial.models.pool import ModelPool as Workbench  # noqa: F401
from fluvial.models.pretrained import ModelConfig as ModelConfig
from fluvial.models.pretrained import load_tokenizer as load_tokenizer
from fluvial.models.states import changed as changed
from fluvial.models.states import initial_state as initial_state
from fluvial.models.states import no_change as no_change
from fluvial.models.targets import LoraSettings as LoraSettings
from fluvial.models.tuning import checkpoint_layers as checkpoint_layers
from fluvial.models.tuning import read_shapes as read_shapes
from fluvial.models.tuning import read_weights as read_weights
from fluvial.models.tuning import reseed_dropout as reseed_dropout
from fluvial.models.tuning import switch_dropout as switch_dropout
from fluvial.models.tuning import tuned_layout as tuned_layout
from fluvial.models.tuning import tuned_parameters as tuned_parameters
from fluvial.models.tuning import whole_layers as whole_layers
from fluvial.models.tuning import write_weights as write_weights
