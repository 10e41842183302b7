"""Label trees: building them as stages, and showing them to a person."""

from __future__ import annotations

from pathlib import Path

from xmcdist.checkpoint.parts import write_csr
from xmcdist.config.commands import TreeShowConfig
from xmcdist.config.errors import UserError
from xmcdist.config.schema import TreeConfig
from xmcdist.data.dataset import TextStore
from xmcdist.pipelines.label_embedding import document_features, files_behind, label_text_stage
from xmcdist.pipelines.levels import overlapping_trees
from xmcdist.pipelines.run import Run
from xmcdist.sparse.features import Features
from xmcdist.trees.build import build_label_tree
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.show import describe_cluster, describe_label, describe_tree

__all__ = ["show_tree", "tree_stage"]


def tree_stage(
    run: Run, name: str, cfg: TreeConfig, features: Features, after: tuple[str, ...], start: Path | None = None
) -> Path:
    """Build a tree and lift the training labels to each of its levels.

    Writes ``tree/`` and ``Y.level-<t>/`` (CSR ``[N, K_t]``, counts, tree order): what
    matcher and rankers read by row, memory-mapped, instead of each holding its own copy.
    Label texts that the tree needs are read in a stage of their own before it.

    Args:
        start: the stage of a tree to start from, among ``after``; None: random members.
    """

    group = "ranker_tree" if cfg is run.cfg.ranker_tree else "tree"
    texts = label_text_stage(run, group, cfg)

    def body(folder: Path) -> None:
        Y = run.data.Y("trn")
        before = None if start is None else LabelTree.load(start / "tree")
        documents = document_features(run, group, cfg, features, folder)
        vectors = None if texts is None else texts[1]
        tree = build_label_tree(documents, Y, cfg, run.world, folder, texts=vectors, start=before)
        run.world.barrier()
        if run.world.is_main:
            (folder / "document_embeddings.npy").unlink(missing_ok=True)
            tree.save(folder / "tree")
        own = run.own_rows(Y)
        for t in range(1, tree.depth + 1):
            write_csr(folder / f"Y.level-{t}", tree.lift(own, t), run.world)
        run.log.say(f"{name}: levels {' > '.join(str(tree.level_size(t)) for t in range(1, tree.depth + 1))}")

    made_of = files_behind(run, group, cfg) | ({} if start is None else {"start": "tree"})
    after = after if texts is None else (*after, texts[0])
    return run.stages.run(name, run.inputs(group, after=after, **made_of), body)


def show_tree(cfg: TreeShowConfig) -> str:
    """The text of ``tree show``.

    Raises:
        UserError: no run or model given, the tree is not there yet, or no such label or cluster.
    """
    if cfg.action != "show":
        raise UserError(f"tree {cfg.action}: there is only `tree show`")
    if (cfg.run_dir is None) == (cfg.model is None):
        raise UserError("give one of run_dir=RUN or model=RUN/model")
    if cfg.model is not None:
        tree_folder, texts_at = Path(cfg.model, "rankers", "tree"), Path(cfg.model)
    else:
        stages = Path(str(cfg.run_dir), "stages")
        plain = [p for p in (stages / "ranker_tree", stages / "tree") if (p / "stage.json").exists()]
        built = [p / "tree" for p in (*overlapping_trees(stages), *plain)]
        if not built:
            raise UserError(f"{cfg.run_dir} has no finished tree stage")
        tree_folder, texts_at = built[0], Path(str(cfg.run_dir), "prepared")
    tree = LabelTree.load(tree_folder)
    texts = TextStore(texts_at, "label_texts")
    if cfg.cluster is not None:
        return describe_cluster(tree, cfg.level if cfg.level is not None else 1, cfg.cluster, texts)
    if cfg.label is not None:
        return describe_label(tree, int(cfg.label) if cfg.label.isdigit() else cfg.label, texts)
    return describe_tree(tree, texts)
