"""Seeds derived from words and numbers, equal on every machine and in every process."""

import hashlib


def seed_from(*parts: object) -> int:
    """A 63-bit seed from any printable parts: ``seed_from(seed, epoch, index)``.

    Neighbouring parts give unrelated seeds, which adding numbers would not.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
