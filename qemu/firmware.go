package qemu

import "redoubt.dev/redoubt/programs"

// FirmwareImage is the path of the image that a firmware's guests start from: what a host
// measures. It is empty for direct boot.
func FirmwareImage(f Firmware) string {
	switch f {
	case SeaBIOS:
		return programs.Path("/usr/share/seabios/bios-256k.bin")
	case OVMF:
		return programs.Path(ovmfCode)
	}
	return ""
}
