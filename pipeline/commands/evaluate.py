"""Score the model, BM25 and both combined on held-out pairs, BEIR folders, sentence pairs and labelled texts.

examples:
  tep evaluate
  tep evaluate --config pairs evaluation.beir_dir=data/scifact
  tep evaluate evaluation.held_out_queries=0 evaluation.beir_dir=data/scifact evaluation.bm25=false
  tep evaluate evaluation.sts_file=sts_b/test.tsv evaluation.clustering_file=topics.tsv
  tep evaluate evaluation.classification_dir=banking    # train.tsv and test.tsv of text and label
"""

from argparse import Namespace

from pipeline.config import Config
from pipeline.core.outcome import Result


def main(config: Config, args: Namespace) -> Result:
    from pipeline.api import evaluate

    return evaluate(config, again=True, check=args.check, rehash=args.rehash)
