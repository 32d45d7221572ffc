package manager

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/attest/eventlog"
	"redoubt.dev/redoubt/vtpm/engine"
)

// extend puts events into their registers, each in all its banks at once.
func extend(tpm transport.TPM, list []eventlog.Event) error {
	for c := range encodeExtends(list) {
		var rsp []byte
		err := c.err
		if err == nil {
			rsp, err = tpm.Send(c.command)
		}
		if err == nil && engine.ResponseCode(rsp) != tpm2.TPMRCSuccess {
			err = engine.ResponseCode(rsp)
		}
		if err != nil {
			return fmt.Errorf("extend PCR %d: %w", c.pcr, err)
		}
	}
	return nil
}

// An extension is a command that extends a register.
type extension struct {
	pcr     uint32
	command []byte
	err     error
}

// encodeExtends encodes the commands that extend events, in their order, while the first of them are
// carried out: package tpm2 takes about as long over one as the TPM does, and a guest may wait for
// the last. The channel has room for all, so the goroutine ends whether they are taken or not.
func encodeExtends(list []eventlog.Event) <-chan extension {
	all := make(chan extension, len(list))
	go func() {
		defer close(all)
		for _, e := range list {
			if e.Type == eventlog.TypeNoAction {
				continue // logged only (PFP 1.05 §10.4.1)
			}
			command, err := encodeExtend(e)
			all <- extension{e.PCR, command, err}
		}
	}()
	return all
}

func encodeExtend(e eventlog.Event) ([]byte, error) {
	var l tpm2.TPMLDigestValues
	for _, d := range e.Digests {
		l.Digests = append(l.Digests, tpm2.TPMTHA{HashAlg: d.Algorithm, Digest: d.Sum})
	}
	var c encoder
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
		Digests:   l,
	}.Execute(&c)
	if !errors.Is(err, errEncoded) {
		return nil, err
	}
	return c.command, nil
}

// An encoder keeps what is sent to it: package tpm2 encodes a command with its authorisations only as
// it sends it.
type encoder struct{ command []byte }

var errEncoded = errors.New("encoded")

// Send implements transport.TPM.
func (c *encoder) Send(command []byte) ([]byte, error) {
	c.command = command
	return nil, errEncoded
}
