"""One rank of shared retrieval: slices gathered, captions scored in shares, against one process with everything."""

from __future__ import annotations

import torch

from clipdist.distributed.rank import joined_ranks
from clipdist.evals import retrieval
from clipdist.evals.embed import Embeddings, gather_embeddings
from clipdist.evals.retrieval import distributed_retrieval, retrieval_metrics, retrieval_ranks


def uneven(rank: int) -> Embeddings:
    """Rank 0 holds three pictures with four captions, rank 1 one of each, a non-ASCII caption, and bad ones."""
    n, m = ((3, 4), (1, 1))[rank]
    return Embeddings(
        image=torch.full((n, 2), float(rank)) + torch.arange(n)[:, None],
        text=torch.full((m, 2), 10.0 + rank),
        text_image=torch.tensor([[0, 1, 1, 2], [0]][rank]),
        captions=[["a", "b", "c", "d"], ["naïve ☃"]][rank],
        keys=[f"{rank}-{row}" for row in range(n)],
        sample_ids=torch.arange(n) + 5 * rank,
        bad=[{"truncated image": ["x"]}, {"truncated image": ["y"], "not an image": ["z"]}][rank],
    )


def slices_are_gathered(rank: int) -> None:
    whole = gather_embeddings(uneven(rank))
    assert whole.image.tolist() == [[0, 0], [1, 1], [2, 2], [1, 1]]
    assert whole.text.tolist() == [[10, 10]] * 4 + [[11, 11]]
    assert whole.text_image.tolist() == [0, 1, 1, 2, 3]
    assert whole.sample_ids.tolist() == [0, 1, 2, 5]
    assert whole.captions == ["a", "b", "c", "d", "naïve ☃"]
    assert whole.keys == ["0-0", "0-1", "0-2", "1-0"]
    assert whole.bad == {"truncated image": ["x", "y"], "not an image": ["z"]}


def work_is_shared(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, cut = 41, 13  # of the pictures; captions are uneven, some pictures have none
    image = torch.randn(n, 8, generator=generator)
    text_image = torch.randint(0, n, (90,), generator=generator).sort().values
    text = image[text_image] + torch.randn(90, 8, generator=generator)
    pictures = range(cut) if rank == 0 else range(cut, n)
    mine = (text_image >= pictures.start) & (text_image < pictures.stop)
    own = Embeddings(
        image=image[pictures.start : pictures.stop],
        text=text[mine],
        text_image=text_image[mine] - pictures.start,
        captions=[""] * int(mine.sum()),
        keys=[str(picture) for picture in pictures],
        sample_ids=torch.tensor(pictures),
        bad={},
    )
    scored = []
    count_rivals = retrieval._count_rivals
    retrieval._count_rivals = lambda *args: scored.append(args[-2:]) or count_rivals(*args)  # type: ignore
    metrics, whole = distributed_retrieval(own)
    assert scored == [[(0, 45), (45, 90)][rank]], scored
    assert torch.equal(whole.image, image)
    assert torch.equal(whole.text_image, text_image)
    assert metrics == retrieval_metrics(image, text, text_image)
    together, alone = (retrieval_ranks(image, text, text_image, together=together) for together in (True, False))
    assert torch.equal(together.text, alone.text)
    assert torch.equal(together.image, alone.image)
    assert torch.equal(together.image_ap, alone.image_ap)
    assert 20 < metrics["t2i_r1"] < 90  # the case says something


def fewer_captions_than_ranks() -> None:
    ranks = retrieval_ranks(torch.eye(3), torch.eye(3)[:1], torch.tensor([0]), together=True)
    assert (ranks.text.tolist(), ranks.image.tolist()) == ([1], [1])


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        slices_are_gathered(dist_env.rank)
        work_is_shared(dist_env.rank)
        fewer_captions_than_ranks()


main()
