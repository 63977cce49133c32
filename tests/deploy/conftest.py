"""What tests of proxies share."""

from __future__ import annotations

import pytest

from tests.deploy.proxies import Edge
from tests.deploy.through import NAME
from tests.transport.certificates import Certificates


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Edge:
    """A certificate for a proxy, by the names that tests call it."""
    certificates = Certificates(tmp_path_factory.mktemp("edge"))
    return Edge(certificates.ca_file, *certificates.pair("edge", "localhost", NAME))
