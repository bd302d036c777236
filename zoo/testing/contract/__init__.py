"""The contract: what every method of the catalogue must do, the zoo's own and other packages' alike.

``pytest --pyargs zoo.testing.contract -k MyMethod`` runs a method's row (``pip install "paper-zoo[test]"``), and with
``-m slow`` its second tier: bf16, torch.compile, torch.export, ONNX, two processes. Importing this needs no pytest.
"""
