"""A GGUF model's copy with its matrices as floats: the same values, without quantized kernels."""

from pathlib import Path

import gguf


def dequantize(source: Path, target: Path, kind: str = "F16") -> Path:
    """Write `source` to `target` with every quantized tensor as `kind`, F16 or F32.

    Metadata and tensors of other types stay as they are. F16 rounds values that Q4_K and Q6_K
    compute in f32; F32 keeps them exactly.
    """
    wanted = gguf.GGMLQuantizationType[kind]
    plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        virtual = field.name.startswith("GGUF.")
        if virtual or field.name in {"general.architecture", "general.file_type"}:
            continue
        value_type, *sub_type = field.types
        writer.add_key_value(
            field.name, field.contents(), value_type, sub_type=sub_type[-1] if sub_type else None
        )
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if stored not in plain:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, stored), wanted)
            stored = wanted
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
