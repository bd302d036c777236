from .prompt.data_ood import FewShotOODDataModule as FewShotOODDataModule
from .prompt.local_prompt import LocalPrompt as LocalPrompt
from .restoration.data_derain import DerainDataModule as DerainDataModule
from .restoration.regformer import Regformer as Regformer
