"""One rank of a run that only says where it is."""

from sws_dist.cli.common import print_result, run_command
from sws_dist.distributed.collectives import gather_on_rank0
from sws_dist.distributed.init import close_distributed, init_distributed


def main() -> None:
    world = init_distributed(timeout_s=60)
    everyone = gather_on_rank0((world.rank, world.local_rank))
    print_result(f"{world}: {everyone}")
    close_distributed()


if __name__ == "__main__":
    run_command(main)
