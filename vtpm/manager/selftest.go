package manager

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/vtpm/engine"
)

// SelfTest has the TPM test what no command has made it test yet (Part 3 §10.2, fullTest NO). A guest's driver asks for that among its
// first commands and waits; what was tested since the last power cycle is not tested again. So it is called when the vTPM is
// ready, while the guest's kernel is on its way to the driver. An error is the guest's to find, too.
func (d *Device) SelfTest(ctx context.Context) error {
	return d.Host(ctx, func(tpm transport.TPM) error {
		rsp, err := tpm.Send(selfTest())
		if err != nil {
			return fmt.Errorf("self-test: %w", err)
		}
		if rc := engine.ResponseCode(rsp); rc != tpm2.TPMRCSuccess {
			return fmt.Errorf("self-test: %w", rc)
		}
		return nil
	})
}

// selfTest is the command, which package tpm2 lacks.
func selfTest() []byte {
	cmd := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	cmd = binary.BigEndian.AppendUint32(cmd, 11)
	cmd = binary.BigEndian.AppendUint32(cmd, uint32(tpm2.TPMCCSelfTest))
	return append(cmd, 0)
}
