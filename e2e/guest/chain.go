package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

// chainPCR is a register that nobody else extends; it begins with zeros at each boot (PC Client PTP
// 1.05 §3.6.1, PCR 16: debug).
const chainPCR = 16

const (
	// chainPause is between two links: the disk wants the guest's processor, too.
	chainPause = 30 * time.Millisecond
	// chainStill is how long there may be none: its manager may be replaced again and again, where a
	// start takes seconds.
	chainStill = time.Minute
)

// A chain extends a register without end and holds its value to what it must be: a command of the
// TPM that was lost or carried out twice breaks it.
type chain struct {
	links  atomic.Uint64
	broken chan error // has room for one

	seen  uint64 // links, and when there were more than before, as check found it
	since time.Time
}

func startChain() (*chain, error) {
	tpm, err := linuxtpm.Open("/dev/tpmrm0")
	if err != nil {
		return nil, err
	}
	c := &chain{broken: make(chan error, 1), since: time.Now()}
	go func() { // ends with the program
		err := c.extend(tpm)
		c.broken <- fmt.Errorf("TPM-ERROR link %d: %w", c.links.Load()+1, err)
	}()
	return c, nil
}

// check fails where the chain is broken or stands still.
func (c *chain) check() error {
	select {
	case err := <-c.broken:
		return err
	default:
	}
	if n := c.links.Load(); n != c.seen {
		c.seen, c.since = n, time.Now()
	}
	if still := time.Since(c.since); still > chainStill {
		return fmt.Errorf("TPM-ERROR: no link since %d, %v ago", c.seen, still)
	}
	return nil
}

// extend ends with an error only.
func (c *chain) extend(tpm transport.TPM) error {
	want := make([]byte, sha256.Size)
	pace := time.NewTicker(chainPause)
	for n := uint64(1); ; n++ {
		link := sha256.Sum256(fmt.Append(nil, n))
		sum := sha256.Sum256(append(want, link[:]...))
		want = sum[:]
		if _, err := (tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: chainPCR, Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: link[:]}}},
		}).Execute(tpm); err != nil {
			return err
		}
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(chainPCR)},
		}}}.Execute(tpm)
		if err != nil {
			return err
		}
		if d := rsp.PCRValues.Digests; len(d) != 1 || !bytes.Equal(d[0].Buffer, want) {
			return fmt.Errorf("PCR %d is %x, it must be %x", chainPCR, d, want)
		}
		if n%16 == 0 { // objects and sessions come and go, too
			p, err := primary(tpm)
			if err != nil {
				return err
			}
			if _, err := (tpm2.FlushContext{FlushHandle: p.ObjectHandle}).Execute(tpm); err != nil {
				return err
			}
		}
		c.links.Store(n)
		<-pace.C
	}
}
