"""Find and delete unused folders under storage.root: failed runs, prepared data, stages, tables, models, graphs.

examples:
  tep clean --dry-run                            # lists without deleting
  tep clean                                      # what has not changed for 7 days
  tep clean --older-than 30 --larger-than 500    # days, MB
  tep clean --config pairs --dry-run storage.root=s3://bucket/prefix
"""

import argparse
from datetime import timedelta

from pipeline.config import Config, ConfigError
from pipeline.core.console import table
from pipeline.core.escaping import printable
from pipeline.core.outcome import Result
from pipeline.core.path import without_options
from pipeline.job import parser


def arguments() -> argparse.ArgumentParser:
    own = parser("clean", __doc__ or "", prepares=False)
    own.add_argument("--older-than", type=float, default=7, metavar="DAYS", help="unchanged for this long (default: 7)")
    own.add_argument("--larger-than", type=float, default=0, metavar="MB", help="in 10^6 bytes (default: any size)")
    own.add_argument("--dry-run", action="store_true", help="list without deleting")
    return own


def main(config: Config, args: argparse.Namespace) -> Result:
    for name, value in (("--older-than", args.older_than), ("--larger-than", args.larger_than)):
        if not 0 <= value <= 1e8:
            raise ConfigError(f"{name}: found {value}; allowed is a number from 0 to 10^8")
    from pipeline.data.unused import find_unused, remove, tables
    from pipeline.index.table import forget_versions

    age = timedelta(days=args.older_than)
    found = [
        each
        for each in find_unused(config)
        if each.age_s >= age.total_seconds() and each.bytes >= args.larger_than * 1e6
    ]
    rows = [
        (each.kind, without_options(str(each.path)), size(each.bytes), f"{each.age_s / 86_400:.1f}", each.why)
        for each in found
    ]
    print(table(rows, ("kind", "folder", "size", "days", "why unused")) if rows else f"nothing unused in {config.root}")
    if args.dry_run:
        freed = sum(each.bytes for each in found)
        if found:
            print(f"{len(found)} folders, {size(freed)}: run again without --dry-run to delete them")
        return Result({"found": len(found), "removed": 0, "bytes": round(freed)}, summary="")
    removed = []
    for each in found:
        if remove(each):
            removed.append(each)
        else:
            print(printable(f"kept {each.path}: another job is at work there"))
    freed = sum(each.bytes for each in removed)
    unused = {each.path for each in found}
    freed += sum(forget_versions(folder, age) for folder in tables(config.root) if folder not in unused)
    print(f"removed {len(removed)} folders and old versions of tables, {size(freed)}")
    return Result({"found": len(found), "removed": len(removed), "bytes": round(freed)}, summary="")


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
