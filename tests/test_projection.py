import numpy as np

from search_r3.projection import Plane


def test_the_plane_holds_the_two_widest_directions():
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0].astype(np.float32)
    flat = random.normal(size=(200, 5)) * [5, 3, 0.1, 0.1, 0.1]
    vectors = (flat @ turn).astype(np.float32) + 7
    plane = Plane.fit(vectors)
    places = plane(vectors)
    for axis in (0, 1):
        assert abs(np.corrcoef(places[:, axis], flat[:, axis])[0, 1]) > 0.99
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-5)
    assert 0.99 < plane.explained <= 1
    np.testing.assert_array_equal(Plane.fit(vectors).axes, plane.axes)


def test_too_few_vectors_for_a_plane():
    for count, explained in ((0, 0), (1, 0), (2, 1)):
        vectors = np.eye(4, dtype=np.float32)[:count]
        plane = Plane.fit(vectors)
        assert plane(vectors).shape == (count, 2)
        assert np.isfinite(plane(vectors)).all()
        assert round(plane.explained, 3) == explained
    assert Plane.fit(np.ones((3, 4), np.float32)).explained == 0
