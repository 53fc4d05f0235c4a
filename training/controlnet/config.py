"""Settings of the data set of people, of the ControlNet's training and of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PeopleFiles:
    """One split of MS COCO 2017."""

    instances: str = ""
    """Annotation file of masks, instances_train2017.json or instances_val2017.json."""
    captions: str = ""
    """Annotation file of captions."""
    wholebody: str = ""
    """COCO-WholeBody's annotation file; without it no person has a face."""
    pictures: str = ""
    """Folder of the pictures."""


@dataclass(frozen=True)
class PeopleConfig:
    """Stage build-people-dataset."""

    count: int = 37470
    """Training pictures wanted: the threshold that lets nearest to so many pass is found, and used
    for both splits. 0 = the threshold below."""
    threshold: float = 0.0
    """Least share of a picture that its people cover, 0..1; used where count is 0."""
    train: PeopleFiles = field(default_factory=PeopleFiles)
    """Files to train on."""
    validation: PeopleFiles = field(default_factory=PeopleFiles)
    """Files to evaluate on."""
