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
	b, err := os.ReadFile(programs.Path(ovmfVars))
	if err != nil {
		return nil, fmt.Errorf("OVMF (Debian package ovmf): %w", err)
	}
	return b, nil
}

// dataDirs: QEMU looks beneath the prefix it was built for unless it is told.
func dataDirs() []string {
	if programs.Root() == "" {
		return nil
	}
	return []string{programs.Path("/usr/share/qemu"), programs.Path("/usr/share/seabios")}
}

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
