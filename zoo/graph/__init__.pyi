from .node.data_nodes import NodeClassificationDataModule as NodeClassificationDataModule
from .node.lagnn import LAGNN as LAGNN
from .recommendation.data_implicit import ImplicitCFDataModule as ImplicitCFDataModule
from .recommendation.nescl import NESCL as NESCL
