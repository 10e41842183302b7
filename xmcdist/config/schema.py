"""The whole configuration as plain dataclasses: types, defaults, and what each setting means.

Imports nothing but the standard library, so ``--help`` and the config tests need no torch.
Below the CLI, code receives these objects and never a ``DictConfig``.  What must hold
between settings is checked in `xmcdist.config.compose`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CheckpointConfig",
    "DatasetConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FeaturesConfig",
    "MatcherConfig",
    "NegativesConfig",
    "OptimizerConfig",
    "OverlapConfig",
    "RankerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrackerConfig",
    "TreeConfig",
]


@dataclass
class DatasetConfig:
    """Where documents and labels come from, and how to read them."""

    name: str = "dataset"
    path: str = "???"
    format: str = "auto"  # auto | text | xc | jsonl | csv | parquet
    prepared: str | None = None  # folder of the prepared form; null: inside the run folder
    text_column: str = "text"  # jsonl, csv, parquet
    labels_column: str = "labels"
    label_separator: str = ";"  # csv: between the labels of one cell
    split_column: str | None = None  # single file: column that says train or test
    test_fraction: float = 0.1  # single file without split column: seeded share held out
    split_seed: int = 0
    drop_unlabelled: bool = False  # leave training documents without a label out
    propensity_a: float = 0.55  # Jain et al. 2016: Wikipedia 0.5, Amazon 0.6, else 0.55
    propensity_b: float = 1.5  # Wikipedia 0.4, Amazon 2.6, else 1.5


@dataclass
class FeaturesConfig:
    """Sparse document features: TF-IDF fitted on the training texts, or given as X.*.npz."""

    kind: str = "auto"  # auto (given if there, else tfidf) | tfidf | given
    word_ngrams: list[int] | None = field(default_factory=lambda: [1, 1])  # [shortest, longest]; null: no words
    char_ngrams: list[int] | None = None  # [shortest, longest] within word boundaries (char_wb); null: none
    lowercase: bool = True
    sublinear: bool = True  # 1 + ln(tf)
    min_df: int = 2  # documents
    max_df: float = 1.0  # share of the documents
    max_features: int | None = 200_000  # most frequent terms kept, per analyzer
    hashing_bits: int | None = None  # 2**bits hashed columns instead of a vocabulary


@dataclass
class TreeConfig:
    """A label tree by balanced spherical k-means over label embeddings, or a given one."""

    path: str | None = None  # a given tree: folder of C_1.npz .. C_T.npz, or of a saved LabelTree
    label_features: str | None = None  # given label embeddings [L, any] .npz/.npy instead of PIFA
    label_embedding: str = "pifa"  # pifa | text | concat | convex: what labels are clustered by
    label_text: str = "encoder"  # encoder | tfidf: what reads the labels' texts
    text_encoder: str | None = None  # minilm | tiny | model id | folder; null: the run's own, as pretrained
    text_weight: Any = 0.5  # convex: share of the text in [0, 1], a number or a .npy [L]
    document_embeddings: str | None = None  # PIFA over these, .npy [N, d] or a run's folder, not over TF-IDF
    flat: bool = False  # one level of clusters above the labels
    nr_splits: int = 16  # children a node
    min_codes: int | None = None  # fewest nodes of the first level; null: nr_splits
    max_leaf_size: int = 100  # most labels in a leaf cluster
    kmeans_max_iter: int = 20
    seed: int = 0


@dataclass
class EncoderConfig:
    """A HuggingFace encoder, by name or folder; ``preset=none`` trains no encoder at all."""

    preset: str = "none"  # none | minilm | tiny | hf
    name: str | None = None  # preset=hf: model id or folder
    pooling: str = "mean"  # cls | mean | pooler
    layers: int | None = None  # keep the first so many layers
    max_length: int = 128  # tokens
    dropout: float | None = None  # null: what the model's own config says
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass
class NegativesConfig:
    """Which clusters' children compete with a document's positives while the matcher trains."""

    scheme: str = "tfn+man"  # tfn | man | tfn+man | consistent | tfn+man+consistent
    weight: str = "none"  # none | score: in the loss, by the matcher's probability of a retrieved parent
    max_active: int = 1000  # most candidates a document; positives are always kept
    confusions_per_cluster: int = 16  # wrong clusters kept for each true one
    consistent_share: float = 0.1  # of a cluster's documents: what counts as consistently wrong


@dataclass
class MatcherConfig:
    """One encoder with a label-sharded head, fine-tuned level by level, coarse to fine."""

    max_clusters: int = 32768  # levels with more nodes are not fine-tuned
    loss: str = "weighted_squared_hinge"  # weighted_squared_hinge | squared_hinge | bce
    bootstrap: str = "weighted-linear"  # linear | weighted-linear | inherit | none
    bootstrap_c: float = 100.0
    beam: int = 20  # clusters kept a document: source of matcher-aware negatives
    steps: list[int] = field(default_factory=lambda: [300])  # optimizer steps a level; the last is repeated
    scoring: str = "auto"  # auto | dense | pairs: how owned rows are scored
    validation_fraction: float = 0.0  # of the training documents, for early stopping
    eval_every: int = 100  # steps, when there is a validation split
    patience: int = 3  # evaluations without improvement before a level stops


@dataclass
class OptimizerConfig:
    """AdamW for the encoder; AdamW, lazy (sparse) Adam or plain gradient descent for the head rows."""

    lr: float = 1e-4
    head_lr: float | None = None  # null: lr
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float = 1.0  # global norm over encoder and every shard of the head; 0 turns it off
    head: str = "adamw"  # adamw | sparse_adam (only rows with a gradient move) | sgd; the last two without weight decay
    max_skipped_steps: int = 10  # of a level, left out because loss or gradient was not finite, before it stops


@dataclass
class ScheduleConfig:
    """Learning rate over the steps of one level, as a factor of the configured rates."""

    name: str = "linear"  # linear | cosine | constant | step | one_cycle | greedy
    warmup: int = 20  # steps from 0 to where the schedule begins
    step_every: int = 100  # step: steps between two cuts
    step_gamma: float = 0.1  # step: what a cut multiplies by
    rise: float = 0.3  # one_cycle: share of the steps until the rate is highest
    start_div: float = 25.0  # one_cycle: begins at 1 / start_div
    end_div: float = 1e4  # one_cycle: ends at 1 / (start_div * end_div)
    metric: str = "train_loss"  # greedy, values fed: train_loss (every step) | validation (every evaluation)
    window: int = 20  # greedy: values averaged
    compare: str = "window_before"  # greedy, what an average must be below: window_before | previous | best
    threshold: float = 0.5  # greedy: by how much
    threshold_mode: str = "noise"  # greedy: noise (standard errors) | rel (shares) | abs
    patience: int = 5  # greedy: one more in a row changes the rate
    factor: float = 0.9  # greedy: a cut multiplies by it, a raise divides
    min_factor: float = 0.1  # greedy: smallest factor of the configured rate
    max_factor: float = 10.0  # greedy: largest
    wait_after_cut: int = 0  # greedy: values (cooldown in transformers)
    wait_after_raise: int = 0  # greedy: values (warmup in transformers)
    waiting: str = "all"  # greedy: all (nothing counts meanwhile) | own (the opposite change goes on)
    reset_after: int = 500  # greedy: cuts at min_factor, after which all starts anew
    max_head_lr: str | None = None  # number | auto (where plain gradient descent is stable; optimizer.head=sgd)


@dataclass
class RankerConfig:
    """Linear one-vs-all rankers, level by level along the refined tree."""

    solver: str = "l2svc_dual"  # l2svc_dual | l1svc_dual | logistic_dual | l2svc_primal
    Cp: list[float] = field(default_factory=lambda: [1.0])  # cost of positives; per level, the last is repeated
    Cn: list[float] = field(default_factory=lambda: [1.0])
    eps: float = 0.1
    max_iter: int = 100
    bias: float = 1.0  # value of the bias feature; 0 turns it off
    threshold: float = 0.1  # smaller sparse weights are dropped
    max_nonzeros_per_label: int | None = None
    weights_dtype: str = "float32"  # float32 | mixed | float16: of the model; mixed: float16 for dense features
    cost_sensitive: bool = False  # weigh positives by the l1-normalised relevance induced up the tree
    negatives: list[str] = field(default_factory=lambda: ["tfn"])  # tfn | man | tfn+man per level, last repeated
    negative_weight: str = "none"  # none | score: negatives that were retrieved weigh by their score
    beam: int = 10
    topk: int = 10
    post_processor: str = "l3-hinge"
    last_post_processor: str | None = None  # null: as post_processor; noop ranks by the raw leaf score
    features: str = "both"  # both | sparse | dense: TF-IDF, embedding, or their concatenation
    clusters_by: str = "rankers"  # rankers | matcher: what finds a document's clusters at prediction
    tree_start: str = "tree"  # tree | random: what the refined tree's k-means starts from
    device: str = "auto"  # auto | cpu | cuda: auto takes a GPU when there is one and it has the solver


@dataclass
class OverlapConfig:
    """Labels in several clusters, those that the trained model retrieves for their documents (disentanglement)."""

    copies: int = 1  # most clusters a label lies in, 1 to 6; 1: the tree stays as it is clustered
    rounds: int = 1  # how often clusters are given out anew and rankers trained again
    max_cluster_size: int | None = None  # most labels given to a cluster; null: any number
    balance: float | None = None  # the same as a multiple of the mean when every label had all its copies
    merge: str = "max"  # max | mean: a label's score from those of its retrieved copies
    fine_tune: bool = False  # the tree of the matcher is given out anew, too, and the matcher trained on


@dataclass
class EngineConfig:
    """Batching, precision, threads and the data-parallel engine."""

    name: str = "cpu"  # cpu | ddp | fsdp2 | zero1 | zero2 | zero3 | zero3_offload
    label_shards: int | None = None  # ranks that share one copy of the label rows; null: all
    global_batch: int = 32  # documents an optimizer step, over all ranks
    micro_batch: int = 32  # most documents a rank encodes at once; accumulation is derived
    precision: str = "fp32"  # fp32 | bf16 | auto: bf16 where every rank's processor has it
    threads: int | None = None  # a process; null: cores divided by local processes
    timeout_s: int = 1800  # a collective without an answer ends the job
    data_timeout_s: float = 300.0  # a training step's documents that have not come by then end the job
    deepspeed_config: str | None = None  # JSON of further DeepSpeed settings; null: launch/deepspeed/<name>.json


@dataclass
class CheckpointConfig:
    """Resumable state inside a level (stages are always committed)."""

    every_steps: int = 200  # 0 turns it off
    keep: int = 2  # newest checkpoints of a level that stay
    asynchronous: bool = True  # written by a thread, from a copy in host memory, while training goes on
    verify: str = "sizes"  # what is looked at before a finished stage is skipped: sizes of its files | full | off


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    use: list[str] = field(default_factory=list)  # of wandb, tensorboard, trackio; several at once; []: none
    log_every: int = 20  # steps
    project: str = "xmcdist"  # wandb, trackio
    run_name: str | None = None  # null: name of the run folder
    mode: str = "offline"  # wandb: offline | online
    entity: str | None = None  # wandb: user or team; null: the key's own
    tags: list[str] = field(default_factory=list)  # wandb


@dataclass
class EvaluationConfig:
    """What is measured on the test documents."""

    ks: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    linear_baseline: bool = True  # also train and score TF-IDF rankers alone, for comparison
    head_share: float = 0.2  # most frequent labels, by count, called head
    tail_below: int = 6  # labels with fewer training documents are called tail; between: torso


@dataclass
class RunConfig:
    """Everything one training run needs."""

    run_dir: str = "runs/default"
    until: str | None = None  # prepare | tree | linear | match | rank: end after these stages; null: all
    seed: int = 0
    members: dict[str, list[str]] = field(default_factory=dict)  # name to overrides: one run each, then an ensemble
    ensemble: str = "average"  # of members: average | rank | sigmoid | softmax | round_robin
    only_members: list[str] | None = None  # train these and leave the others; []: join those that are finished
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    ranker_tree: TreeConfig = field(default_factory=TreeConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
