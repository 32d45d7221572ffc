package qemu

import (
	"fmt"
	"os"

	"redoubt.dev/redoubt/programs"
)

const (
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// NewVars is the content of a fresh variable store for OVMF, to be copied for each guest.
func NewVars() ([]byte, error) {
	b, err := os.ReadFile(VarsTemplate())
	if err != nil {
		return nil, fmt.Errorf("OVMF (Debian package ovmf): %w", err)
	}
	return b, nil
}

// DataDirs are the directories of QEMU's firmware and option ROMs.
func DataDirs() []string {
	return []string{programs.Path("/usr/share/qemu"), programs.Path("/usr/share/seabios")}
}

// VarsTemplate is the file that [NewVars] reads.
func VarsTemplate() string { return programs.Path(ovmfVars) }

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
