import pytest
import torch

from fedsim.attacks.idlg import IDLGConfig
from fedsim.errors import ConfigError
from fedsim.privacy.metrics import score
from tests.attacks.problems import lenet, observe, victims

SHAPE = (1, 12, 12)


@pytest.mark.parametrize("ignore", [(), ("fc.*",)])
def test_label_and_image_are_found(ignore):
    images, labels = victims(2, shape=SHAPE)
    found = IDLGConfig(ignore=ignore).build().reconstruct(observe(lenet("uniform", SHAPE), images, labels))
    assert torch.equal(found.labels, labels)
    assert min(row.PSNR for row in score(images, found.images)) > 35


def test_batches_are_refused():
    images, labels = victims(2, batch=2, shape=SHAPE)
    with pytest.raises(ConfigError, match="idlg finds the label of a single image"):
        IDLGConfig().build().reconstruct(observe(lenet("uniform", SHAPE), images, labels))
