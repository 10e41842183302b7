"""Settings of the commands beside ``train``, whose own are in `xmcdist.config.schema`, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xmcdist.config.schema import DatasetConfig, EvaluationConfig, RunConfig

__all__ = [
    "CalibrateConfig",
    "CountsConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "GiantClassifyConfig",
    "GiantConfig",
    "GraphConfig",
    "ImportPecosConfig",
    "PlanConfig",
    "PredictConfig",
    "ServeConfig",
    "TreeShowConfig",
]


@dataclass
class DoctorConfig:
    """Check a machine, a job's ranks, a run folder, a model folder."""

    run_dir: str | None = None  # a run's folder: whether its stages are whole
    model: str | None = None  # a model folder: whether it can be opened
    folder: str | None = None  # that all ranks should see; null: run_dir, or else $XMCDIST_RUNS, or else here
    verify: bool = False  # read every byte of run_dir and model and compare checksums
    gpu: bool = True  # take GPUs where there are any
    timeout_s: int = 60  # a rank that does not answer for so long is named, and the check ends
    wait_s: float = 10.0  # for a file that another rank wrote


@dataclass
class CountsConfig:
    """Counts of a data set that is not at hand; null: counted in the data, or estimated."""

    documents: int | None = None  # training documents
    test_documents: int = 0
    labels: int | None = None
    labels_per_document: float | None = None  # mean
    columns: int | None = None  # of the sparse features; null: features.max_features
    values_per_document: float = 64.0  # mean stored values of a document's sparse features
    tokens_per_document: float | None = None  # mean; null: encoder.max_length


@dataclass
class PlanConfig:
    """Where a run is planned for, beside all settings of train."""

    gpu: str | None = None  # h100, a100, l4, ... or cpu; null: what this machine has
    gpus: int = 1  # processes a node, a GPU each; with gpu=cpu: CPU processes
    nodes: int = 1
    network: str = "ndr"  # between nodes: ndr | hdr | 100gbe | 25gbe
    utilisation: float = 0.4  # share of the published or measured FLOP/s that the encoder's training reaches
    cores: int | None = None  # CPU cores a node; null: this machine's
    memory_gb: float | None = None  # of a GPU, or of a node of CPU processes; null: as published, or this machine's
    counts: CountsConfig = field(default_factory=CountsConfig)
    output: str | None = None  # JSON file for all figures; null: only printed
    scaling: bool = False  # print the tables of docs/scaling.md instead


@dataclass
class GraphConfig:
    """A graph whose nodes have texts, and which of its edges are learnt from."""

    path: str | None = None  # folder of the Open Graph Benchmark (raw/, mapping/, split/); null: text and edges
    text: Any = None  # file of the nodes' texts, or a list: .txt with a node a line, or jsonl, csv, parquet
    edges: str | None = None  # .npz adjacency, .npy [2, E], .csv, .tsv or .parquet of two columns
    text_columns: list[str] = field(default_factory=lambda: ["text"])  # jsonl, csv, parquet: joined by a space
    id_column: str | None = None  # the same: how edges name the node; null: by its number, from 0
    edge_columns: list[str] | None = None  # csv, parquet: [source, target]; null: the first two
    max_degree: int = 1000  # nodes with as many neighbours are no training documents, but stay labels
    holdout: float = 0.0  # share of the edges kept from training, to measure how well neighbours are found
    rewired: bool = False  # negative control: every node keeps its degree, and gets other neighbours at random


@dataclass
class GiantConfig(RunConfig):
    """Embeddings of a graph's nodes: its own settings, beside all those of train."""

    graph: GraphConfig = field(default_factory=GraphConfig)


@dataclass
class GiantClassifyConfig:
    """Classify nodes by embeddings: how good they are."""

    embeddings: str = "???"  # what giant wrote (RUN/embeddings), or any .npy [n, d]
    classes: str | None = None  # a class a node: .npy [n], or .txt or .csv with one a line, empty: none
    path: str | None = None  # folder of the Open Graph Benchmark, for classes and split; null: the two settings
    split: str | None = None  # folder with train, valid and test (.csv.gz, .csv, .txt, .npy: node numbers); null: drawn
    train_share: float = 0.6  # of a split that is drawn
    valid_share: float = 0.2
    model: str = "mlp"  # mlp | linear | sage (GraphSAGE by torch-geometric: pip install 'xmcdist[graph]')
    edges: str | None = None  # of model=sage: as graph.edges of giant, nodes by number; null: those of path
    hidden: int = 256
    layers: int = 3  # linear maps, hidden ones and the last
    dropout: float = 0.5
    lr: float = 0.01
    weight_decay: float = 0.0
    epochs: int = 300
    patience: int = 50  # epochs in which the validation nodes get no better before it stops
    batch: int = 65536  # nodes a step
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output: str | None = None  # JSON file for the accuracies; null: only printed


@dataclass
class PredictConfig:
    """Predict labels for the lines of a file, or the rows of a matrix, with a model folder or several."""

    model: Any = "???"  # a folder, or a list of folders that answer as an ensemble
    ensemble: str | None = None  # several models: average | rank | sigmoid | softmax | round_robin; null: average
    input: str = "???"  # one document a line, or .jsonl with text_column, .gz too; features [N, D] as .npz
    features: str | None = None  # beside texts, for a model that reads both: features [N, D] as .npz
    output: str = "???"  # JSONL: one object a document
    text_column: str = "text"
    k: int = 10
    beam: int | None = None  # null: as trained
    batch: int = 1024  # documents at a time
    parallel: str = "documents"  # on several processes: documents | labels
    one_encoder: bool = True  # several models: hold one of their encoders at a time, read anew for every batch


@dataclass
class ServeConfig:
    """Answer over HTTP with a model folder or several; limits are those of each worker."""

    model: Any = "???"  # a folder, or a list of folders that answer as an ensemble
    ensemble: str | None = None  # several models: average | rank | sigmoid | softmax | round_robin; null: average
    host: str = "127.0.0.1"  # this machine alone; there is no authentication
    port: int = 8000  # 0: any free one
    workers: int = 1  # processes, which share the mapped model
    threads: int | None = None  # of a worker; null: cores divided by workers
    exact: bool = True  # an encoder reads documents one by one: an answer does not depend on who else asks
    max_batch: int = 64  # documents that the model is asked about at once
    max_wait_ms: float = 0.0  # a free worker waits so long for more documents; 0: not at all
    max_queue: int = 2048  # documents that wait; a request beyond is answered 503
    timeout_s: float = 30.0  # for reading a request, and again for answering it
    max_body_mb: float = 4.0  # of a request
    max_documents: int = 256  # of a request
    max_characters: int = 100_000  # of a document
    max_k: int = 100  # labels a document
    max_beam: int = 200
    access_log: bool = False  # a line a request


@dataclass
class EvaluateConfig:
    """Measure a model folder, or several as an ensemble, on the test split of a data set."""

    model: Any = "???"  # a folder, or a list of folders that answer as an ensemble
    ensemble: str | None = None  # several models: average | rank | sigmoid | softmax | round_robin; null: average
    output: str | None = None  # JSON file for the metrics; null: only printed
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    beam: int | None = None
    batch: int = 256
    parallel: str = "documents"
    one_encoder: bool = True


@dataclass
class CalibrateConfig:
    """Fit probabilities to a model's scores, on documents that it was not trained on."""

    model: str = "???"  # the folder that gets calibration.json
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    split: str = "tst"  # whose documents: tst | trn, the latter of a data set that the model was not trained on
    method: str = "isotonic"  # isotonic | platt
    k: int = 10  # labels a document that are looked at
    beam: int | None = None
    batch: int = 256
    seed: int = 0  # of the halves that the error is measured on


@dataclass
class ImportPecosConfig:
    """Convert a PECOS XR-Linear folder into a model folder."""

    source: str = "???"  # what XLinearModel.save wrote, or Text2Text.save
    output: str = "???"  # a folder that is new or empty
    labels: str | None = None  # texts of the labels, one a line; null: those of Text2Text, or numbers
    label_frequency: str | None = None  # training labels [N, L] as .npz: for propensities and bands of evaluate


@dataclass
class TreeShowConfig:
    """Look at the label tree of a run or a model."""

    action: str = "show"
    run_dir: str | None = None  # a run folder ...
    model: str | None = None  # ... or a model folder
    label: str | None = None  # label id, or its text
    level: int | None = None  # with cluster: which node
    cluster: int | None = None
