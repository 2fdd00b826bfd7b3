"""Names of the published fundus split, as the list files of RAM-DSIR (commit f7eddf7, dataset/fundus) have them.

With them a missing file can be named, and the original releases get the same training and test part as the crops.
"""

from __future__ import annotations

from typing import Final

# Drishti-GS: g (glaucoma) or n (normal) and the number of the image.
_DRISHTI_TRAIN = """
n089 g024 g002 g022 n057 n041 n042 g015 n017 g061 g049 g040 g066 g064 g080 g032 g058 n036 n008 g084 g069 n035 g016 g051
g076 g062 g010 g012 n094 n047 g081 g068 g045 g044 n037 g026 g088 n033 g060 n092 g038 n101 g075 n090 g063 g004 n046 g031
n098 n018
"""
_DRISHTI_TEST = """
g039 n091 g025 g052 g056 g079 g087 g073 g029 n013 n007 g059 g019 g086 n099 n085 g083 g005 g020 g006 g065 g048 g023 g067
g030 g054 n009 g003 g077 g034 n093 g050 g071 g028 g053 g001 g027 n096 g043 g082 n072 g070 g021 n097 g074 g055 g014 n100
n078 g011 n095
"""
_RIM_ONE_TRAIN = """
S-22-L N-71-L N-27-L N-59-L S-10-R N-10-R G-32-L N-14-R S-1-L G-16-R S-28-R N-76-R S-24-R N-24-R N-74-L G-17-L G-5-R
N-81-L N-84-R S-16-R G-1-L G-14-R G-21-R S-23-L G-36-R S-14-R N-26-R N-85-L S-20-L N-68-R S-11-L G-6-L N-91-L N-82-R
N-90-R N-55-L N-73-R G-20-L G-7-L N-69-L N-58-R G-18-R G-34-L S-19-R N-87-L N-72-R N-12-R N-70-R G-3-R G-19-R G-12-L
N-6-R S-12-L N-5-L G-8-R G-39-L S-13-R G-37-R S-17-L S-21-R N-53-L G-35-R N-64-R N-25-L N-63-L N-9-L N-11-L N-13-L
N-92-R G-9-R S-26-R N-54-R N-83-L G-15-L N-79-L G-13-R N-61-L N-86-R G-38-L S-15-L N-56-R N-65-L N-16-R S-27-L G-4-L
N-66-R G-11-R N-80-R S-25-L N-52-R N-75-R N-88-R N-8-L N-67-L G-33-R S-18-L N-7-L N-62-R G-10-L
"""
_RIM_ONE_TEST = """
S-29-R S-2-L N-4-R N-33-L G-29-R N-50-R N-43-L N-39-L N-3-L N-2-R N-46-R N-51-L N-30-R N-18-R S-7-L N-49-L G-25-L S-31-L
N-31-L N-37-L G-2-R N-36-R G-24-L N-48-R N-40-R S-33-R S-6-R N-41-L N-78-R S-35-R G-26-R G-22-L S-9-L G-31-R G-27-R
N-35-L S-8-R S-4-L S-3-R N-1-L N-44-R G-28-L N-32-R N-38-R N-29-L S-32-L S-5-L N-23-L N-17-L S-30-L N-28-R N-47-L N-21-L
G-23-R N-22-R N-34-R S-34-L N-42-R G-30-L N-20-R
"""
# REFUGE training: g0001 to g0040 and n0001 to n0360; what is not in the test part is in the training part.
_REFUGE_TRAIN_TEST = """
n0278 n0170 n0128 n0055 n0312 n0275 n0154 n0184 n0293 n0310 n0329 n0243 n0200 n0147 g0031 n0211 n0268 n0140 n0241 n0056
n0069 n0305 n0101 n0144 n0266 n0222 g0001 n0250 n0028 n0087 n0054 n0294 n0031 n0313 n0064 n0136 n0326 n0356 n0254 n0137
n0348 n0012 n0199 n0133 n0098 n0228 g0033 g0015 n0328 n0045 n0277 n0032 n0332 n0316 n0300 n0107 n0291 n0314 n0138 n0176
n0207 n0024 n0139 n0301 n0015 n0072 g0002 n0284 g0004 n0097 n0331 n0288 n0177 n0004 n0197 n0159 g0008 n0318 n0077 n0050
"""
# REFUGE validation: V0001 to V0400.
_REFUGE_VALIDATION_TEST = """
158 328 212 341 334 324 366 201 377 25 11 20 299 357 82 132 217 197 55 221 62 273 187 147 281 267 186 96 350 172 312
49 194 360 135 19 27 81 102 90 182 315 388 183 60 145 39 254 2 275 250 35 69 257 89 291 125 316 78 330 45 33 381 276
314 331 128 222 22 12 256 282 17 258 358 175 31 3 154 284
"""


def _drishti(words: str) -> frozenset[str]:
    return frozenset(f"{word[0]}drishtiGS_{word[1:]}" for word in words.split())


_REFUGE_TRAIN: Final = frozenset(
    [f"g{number:04d}" for number in range(1, 41)] + [f"n{number:04d}" for number in range(1, 361)]
)
_REFUGE_VALIDATION: Final = frozenset(f"V{number:04d}" for number in range(1, 401))
_TEST3: Final = frozenset(_REFUGE_TRAIN_TEST.split())
_TEST4: Final = frozenset(f"V{int(word):04d}" for word in _REFUGE_VALIDATION_TEST.split())

PUBLISHED: Final[dict[tuple[str, str], frozenset[str]]] = {
    ("Domain1", "train"): _drishti(_DRISHTI_TRAIN),
    ("Domain1", "test"): _drishti(_DRISHTI_TEST),
    ("Domain2", "train"): frozenset(_RIM_ONE_TRAIN.split()),
    ("Domain2", "test"): frozenset(_RIM_ONE_TEST.split()),
    ("Domain3", "train"): _REFUGE_TRAIN - _TEST3,
    ("Domain3", "test"): _TEST3,
    ("Domain4", "train"): _REFUGE_VALIDATION - _TEST4,
    ("Domain4", "test"): _TEST4,
}
"""(domain, part) -> names of its cases, without suffix."""
