"""Read settings.ini and hand it to setuptools; run notebooks and pretrained pipelines travel inside the wheel."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
about = parser["DEFAULT"]
pretrained = [p.relative_to("data/pretrained").as_posix() for p in Path("data/pretrained").rglob("*") if p.is_file()]

setup(
    name=about["lib_name"], version=about["version"], description=about["description"], author=about["author"],
    license=about["license"], keywords=about["keywords"], python_requires=f">={about['min_python']}",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=[*find_packages(include=["medgen_nb*"]), "medgen_nb.notebooks", "medgen_nb.pretrained"],
    package_dir={"medgen_nb.notebooks": "nbs", "medgen_nb.pretrained": "data/pretrained"},
    package_data={"medgen_nb.notebooks": ["*_run.ipynb"], "medgen_nb.pretrained": pretrained},
    install_requires=about["requirements"].split(), extras_require={"dev": about["dev_requirements"].split()},
    entry_points={"console_scripts": about["console_scripts"].split()},
)
