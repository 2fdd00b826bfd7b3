"""Sums over sites of which the coordinator sees the total alone.

Every site adds masks to its numbers that cancel in the sum of all sites. The protocol is that of
Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", ACM
CCS), figure 4, with the consistency check; docs/explanation/privacy.md says what it promises.

| module | content |
| --- | --- |
| `fixed_point` | real numbers as integers modulo 2^64, and the proof that no sum overflows |
| `masks` | X25519 key agreement, HKDF, ChaCha20: masks of one round and one pair |
| `shamir` | secrets shared over a prime field, so that a site that drops out is recovered |
| `keys` | the sites' identities, which sign the keys of a round |
| `party`, `opening` | the two sides of the protocol, as state machines without a transport |
| `contribution` | what is summed: weights, class statistics, moments, figures |
| `history` | sums that were opened, so that no two of them isolate a few sites |
"""
