"""One rank of a run that only says where it is."""

from sws_dist import cli, comm


def main() -> None:
    world = comm.init(timeout_s=60)
    everyone = comm.gather_to_main((world.rank, world.local_rank))
    cli.say(f"{world}: {everyone}")
    comm.close()


if __name__ == "__main__":
    cli.run(main)
